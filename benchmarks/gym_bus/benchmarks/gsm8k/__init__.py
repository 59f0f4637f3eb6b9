"""GSM8K: grade-school word problems with a whole number as the answer."""
