"""All shipped policies, by the qualified name of the class of layers that each applies to."""

from . import decoders, encoder_decoders, encoders, vision_speech
from .shipped_policy import ShippedPolicy

SHIPPED: dict[str, type[ShippedPolicy]] = {
    f"transformers.models.{policy.layer_class}": policy
    for module in (encoders, decoders, encoder_decoders, vision_speech)
    for policy in module.POLICIES
}
