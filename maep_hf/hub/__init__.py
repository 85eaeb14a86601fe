"""The Hub: cards from records, pushes of everything this package makes, pushes while a run trains."""

from .cards import render_card, write_card
from .connection import PushError
from .contents import LeakError
from .push import Pushed, push_to_hub
from .records import load_records

render_model_card = render_card

__all__ = [
    "LeakError",
    "PushError",
    "Pushed",
    "load_records",
    "push_to_hub",
    "render_card",
    "render_model_card",
    "write_card",
]
