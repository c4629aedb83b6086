"""What every room stands on: files written whole, progress, objects that show themselves."""
