"""What everything stands on: errors, devices, hashes, files, progress, time."""
