"""Start processes on machines (`launch`) and examine machines (`doctor`)."""
