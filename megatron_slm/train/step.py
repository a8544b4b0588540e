"""x"""
from dataclasses import dataclass
@dataclass
class StepInput:
    a: object
    b: object
