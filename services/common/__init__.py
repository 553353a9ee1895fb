"""What all three services share: settings, errors, HTTP plumbing, batching and the shapes on the wire; no business logic."""
