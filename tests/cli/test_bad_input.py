"""A mistake of the user: exit code 2 and one line that says what, where and what to do."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from conftest import TORCHRUN, run
