"""The bus: JetStream streams, publishing with acks, continuous pulls. The only package that uses the NATS client."""

from gym_bus.bus.connection import Bus, as_result, redact
from gym_bus.bus.publish import Admission
from gym_bus.bus.pull import Delivery, Follower, Pull
from gym_bus.bus.streams import Outcome
from gym_bus.bus.tries import FREE_DELIVERIES

__all__ = ["FREE_DELIVERIES", "Admission", "Bus", "Delivery", "Follower", "Outcome", "Pull", "as_result", "redact"]
