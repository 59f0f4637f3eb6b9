"""Workers: the processes between the streams."""
