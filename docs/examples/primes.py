"""A program for `gym-bus sandbox run`: the primes below a hundred, and what it may not do."""

import socket

print([n for n in range(2, 100) if all(n % k for k in range(2, n))])
try:
    socket.socket()
except OSError as e:
    print("no sockets:", e.strerror)
