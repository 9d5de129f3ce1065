"""Thin Ray actors: telemetry, node forecaster, coordinator."""
