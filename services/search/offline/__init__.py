"""What is done with the service's data beside serving it: backing it up and restoring it. `tercet` runs this as a process."""
