"""The invented world of the embedded models: its facts, its benchmark, and how they are trained."""
