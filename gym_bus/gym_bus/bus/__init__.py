"""The bus: JetStream streams, publishing with acks, continuous pulls. The only package that uses the NATS client."""

from gym_bus.bus.connection import Bus, as_result, redact
from gym_bus.bus.publish import Admission
from gym_bus.bus.pull import Delivery, Follower, Pull

__all__ = ["Admission", "Bus", "Delivery", "Follower", "Pull", "as_result", "redact"]
