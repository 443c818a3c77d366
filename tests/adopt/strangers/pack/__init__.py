from .model import Decoder as Decoder
