"""Scorers behind one Protocol: services/rerank/ports.py says what each must do."""
