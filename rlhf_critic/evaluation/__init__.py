"""From rewards to figures: accuracy, calibration, length control, best of n, report. Knows no model."""
