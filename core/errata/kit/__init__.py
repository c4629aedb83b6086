"""What method authors build on: contexts, values, second moments, solving and training."""
