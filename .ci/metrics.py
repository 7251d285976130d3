"""Scrapes a training run and hands the text to `promtool check metrics`.

    python3 .ci/metrics.py target/debug/kitsune
"""

import subprocess
import sys
import time
import urllib.request


def scrape(url, until):
    """The text at `url` as soon as it contains `until`."""
    for _ in range(300):
        text = urllib.request.urlopen(url, timeout=10).read()
        if until in text:
            return text
        time.sleep(0.1)
    sys.exit(f"no {until.decode()} at {url} within 30 s")


def main():
    # Far more steps than it takes to be scraped; the run is ended below.
    command = [sys.argv[1], "train", "--steps", "10000000", "--metrics", "127.0.0.1:0"]
    training = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        line = training.stderr.readline()
        if not line.startswith("metrics: "):
            sys.exit(f"the run told no address but: {line}")
        text = scrape(line.removeprefix("metrics: ").strip(), b"kitsune_amp_")
    finally:
        training.kill()
        training.wait()
    sys.exit(subprocess.run(["promtool", "check", "metrics"], input=text).returncode)


main()
