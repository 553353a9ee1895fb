"""Models behind one Protocol: services/embedding/ports.py says what each must do."""
