"""Files on disks and object stores, and the ledger kept in them. Independent of datasets and engines."""
