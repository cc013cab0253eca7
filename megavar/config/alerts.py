"""When a run calls for a person."""

from pydantic import Field

from megavar.config.base import Section


class AlertsConfig(Section):
    """What counts as odd. Alerts end no run: they stand in console, ``metrics.jsonl``, ``megavar status`` and doctor,
    and go to the command of the cluster file's ``notify``. Ours, chosen such that the papers' settings raise none."""

    loss_above_uniform: float | None = Field(1.25, gt=0)
    """``loss_above_uniform``: the loss is above this multiple of what guessing gives, the logarithm of the vocabulary
    size, where every run begins. None: never; of no meaning for vectors instead of ids."""
    gradient_norm: float | None = Field(10.0, gt=1)
    """``gradient_norm``: above this multiple of the median of the recent past. None: never."""
    expert_share: float | None = Field(0.05, gt=0, lt=1)
    """``expert_collapse``: some expert of a block gets less than this part of its fair share of the tokens. None:
    never."""
    throughput: float | None = Field(0.5, gt=0, lt=1)
    """``throughput_drop``: in two lines in a row fewer images per second than this part of the recent median. None:
    never."""
    data_wait_share: float | None = Field(0.5, gt=0, lt=1)
    """``stalled_data``: more than this part of the time goes into waiting for samples. None: never."""
    stall_seconds: float | None = Field(60.0, gt=0)
    """``stalled_data`` and ``stalled_step``: no step for this long and for ten times the median step; ten times as long
    before the first step, which may compile. None: never."""
    disk: bool = True
    """``disk``: the next checkpoint will not find room, or the disk fills up before the run ends, within a day."""
    window: int = Field(50, ge=5)
    """Logged lines that make up the recent past; medians are taken from the fifth on."""
