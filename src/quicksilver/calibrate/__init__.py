"""What a calibration text tells of a model."""
