"""The unmodified client of the Hub in a process of its own, against the loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path


TOKENS = {"ada": "hf_adas_own_token", "bob": "hf_bobs_own_token"}

CLIENT = """
import json, logging, sys
sys.path[:0] = [{tests!r}]
answers = {{}}

def outcome(action):
    try:
        return str(action())
    except BaseException as error:
        return f"{{type(error).__name__}}: {{error}}"
"""


def run_client(hub, folder, code, user="ada", endpoint=None, modules=None, **env):
    """Runs `code` in a process of its own, as a user's would be; what it puts in `answers`."""
    tests = str(Path(__file__).parent.parent)
    result = subprocess.run(
        [sys.executable, "-c", CLIENT.format(tests=tests) + code + "\nprint('\\n' + json.dumps(answers))"],
        capture_output=True,
        text=True,
        cwd=folder,
        env={
            **{name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ},
            "HF_ENDPOINT": endpoint or hub.endpoint,
            "HF_TOKEN": TOKENS.get(user, user),
            "HF_HOME": str(folder / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
            **env,
        },
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1]), result.stdout + result.stderr
