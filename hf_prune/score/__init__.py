"""What each unit is worth: statistics of one calibration pass, and criteria over them."""
