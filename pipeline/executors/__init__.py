"""Executors take the split input and write durable records: live or through batch APIs."""
