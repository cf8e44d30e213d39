"""Executors: each takes the rows of a run and makes their answers durable in the ledger."""
