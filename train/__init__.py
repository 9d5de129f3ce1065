"""Offline retraining of the forecasters on logged telemetry."""
