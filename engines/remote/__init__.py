"""Engines behind an API: one HTTP engine, a pure module for each wire format, providers as data (`conf/engine/*.yaml`)."""
