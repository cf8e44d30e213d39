"""Reads input files into parsed rows and computes their keys."""
