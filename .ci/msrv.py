"""Fails if a crate that users build declares a newer compiler than this one does.

Cargo resolves to the newest versions, so an update can raise the oldest compiler unnoticed. Crates that
only tests and benches need are left out: who uses the library does not build them.
"""

import json
import subprocess
import sys


def version(text):
    return tuple(int(part) for part in text.split("."))


def built_by_users(nodes, root):
    """Ids of the packages that `root` reaches without a dev-dependency."""
    reached, waiting = set(), [root]
    while waiting:
        package = waiting.pop()
        if package in reached:
            continue
        reached.add(package)
        for dependency in nodes[package]["deps"]:
            if any(kind["kind"] != "dev" for kind in dependency["dep_kinds"]):
                waiting.append(dependency["pkg"])
    return reached


def main():
    command = ["cargo", "metadata", "--format-version", "1", "--all-features", "--locked"]
    metadata = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    packages = {package["id"]: package for package in metadata["packages"]}
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    ours = metadata["workspace_default_members"]
    oldest = packages[metadata["resolve"]["root"]]["rust_version"]

    reached = set().union(*(built_by_users(nodes, package) for package in ours))
    too_new = [
        f"{package['name']} {package['version']} needs Rust {package['rust_version']}"
        for package in (packages[identity] for identity in reached)
        if package["rust_version"] and version(package["rust_version"])[:2] > version(oldest)[:2]
    ]
    if too_new:
        sys.exit("\n".join([f"newer than Rust {oldest}, which Cargo.toml promises:", *sorted(too_new)]))
    print(f"{len(reached)} crates declare nothing newer than Rust {oldest}")


main()
