"""A running `eplb metrics`, and what it answers."""

import re
import signal
import subprocess
import sys
import time
import urllib.request

from prometheus_client.parser import text_string_to_metric_families


class Metrics:
    """A running `eplb metrics`."""

    def __init__(self, session, *options):
        command = [sys.executable, "-m", "flash_eplb.eplb.cli", "metrics", "--session", session]
        self.process = subprocess.Popen(
            [*command, "--port", "0", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.first = self.process.stdout.readline().strip()
        self.url = re.search(r"http://\S+/metrics", self.first)[0]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def get(self):
        """Values by (name, session left out, other labels)."""
        text = urllib.request.urlopen(self.url, timeout=30).read().decode()
        found = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = [value for name, value in sample.labels.items() if name != "session"]
                found[(sample.name, *labels)] = sample.value
        return found

    def get_until(self, key, value):
        """All values, once that of `key` is `value`."""
        for _ in range(600):
            found = self.get()
            if found.get(key) == value:
                return found
            time.sleep(0.02)
        raise AssertionError(f"{key} is {found.get(key)}")

    def end(self, number=signal.SIGTERM):
        """End it by signal `number`: (exit code, output, errors)."""
        self.process.send_signal(number)
        said, errors = self.process.communicate(timeout=60)
        return self.process.returncode, said, errors
