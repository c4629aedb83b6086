"""Classifiers made of an encoder of the zoo: of claims, and of topics whose labels shift."""
