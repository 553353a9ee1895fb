"""What is done with a model beside serving it: exporting it, and fitting projections. `tercet` runs this as a process."""
