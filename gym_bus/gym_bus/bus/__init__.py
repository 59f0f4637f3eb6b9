"""The bus: JetStream streams, publishing with acks, continuous pulls. The only package that uses the NATS client."""

from gym_bus.bus.connection import Bus, as_result
from gym_bus.bus.pull import Delivery, Follower, Pull
from gym_bus.bus.streams import Outcome
from gym_bus.bus.tries import FREE_DELIVERIES

__all__ = ["FREE_DELIVERIES", "Bus", "Delivery", "Follower", "Outcome", "Pull", "as_result"]
