"""The verbs ``mslm doctor``: is this configuration, on this machine, fit for what is asked of it?"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from megatron_slm.commands.command import EXIT_OK, OVERRIDES, Verb, parser_of, resolve, violations_of
from megatron_slm.errors import ConfigError

EXIT_ACTIVE = 1


def determinism(name: str, tokens: Sequence[str]) -> int:
    """``mslm doctor determinism``: what can make two equal runs differ, and what to set."""
    parser = parser_of(
        name,
        "[CONFIG] [key=value | --flag ...] [--json]",
        "List every source of nondeterminism of a job, whether it is active on its device under the variables of this "
        "shell, and what to set; and what must be equal for two runs to be equal to the last bit. The device is "
        "parallel.device, whether or not it is here. Exit code 0 if nothing is active, 1 if something is.",
        example="mslm doctor determinism --preset tiny --deterministic parallel.device=cuda parallel.world_size=8",
        notes=OVERRIDES,
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    own, rest = parser.parse_known_args(tokens)
    resolved = resolve(rest)
    if found := violations_of(resolved, None, files=False):
        raise ConfigError("\n".join(found))
    from megatron_slm.parallel.device import choose_device, device_name, preload

    parallel, here = resolved.config.parallel, choose_device("auto")
    device = here if parallel.device == "auto" else parallel.device
    preload(device)
    from megatron_slm.doctor import determinism as room

    world_size = parallel.world_size or parallel.smallest_world_size
    target = room.target_of(resolved.config, device, world_size, os.environ)
    terms = room.contract(target, device_name(device) if device in ("cpu", here) else device)
    print(room.to_json(target, terms) if own.json else room.report(target, terms))
    return EXIT_ACTIVE if room.active(target) else EXIT_OK


VERBS: Mapping[str, Verb] = {
    "doctor determinism": Verb("list what can make two equal runs differ, and what to set", determinism)
}
