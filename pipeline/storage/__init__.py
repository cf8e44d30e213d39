"""Files on any store, and the ledger in them. Knows no dataset and no engine."""
