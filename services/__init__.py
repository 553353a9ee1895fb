"""The three Tercet services and the code they share."""
