"""What changes, and what is on the model: requests, edits, deltas, the stack and the ledger."""
