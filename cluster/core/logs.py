"""Makes this project's lines at INFO seen: Ray and Serve set up loggers of their own and leave ours without a handler.

Called where a process of ours begins. Calling it again changes nothing.
"""

from __future__ import annotations

import logging

PACKAGES = ("cluster", "drafters", "deployments")
SERVE = "ray.serve"  # has a handler in every Serve replica: the replica's own file
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def show_logs_in_replica() -> None:
    """In a Serve replica: our lines go where Serve's go, in its form."""
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.parent = logging.getLogger(SERVE)  # not its handlers: Serve replaces those when its options change


def show_logs_in_actor() -> None:
    """In a plain actor: to stderr, which Ray keeps in a file of the worker, where nobody has set up logging yet."""
    logging.basicConfig(format=FORMAT)
    for name in PACKAGES:
        logging.getLogger(name).setLevel(logging.INFO)
