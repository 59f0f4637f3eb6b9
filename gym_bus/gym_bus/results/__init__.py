"""Result files: writing, reading, profiling. Plain synchronous code over local files."""
