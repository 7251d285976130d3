"""A trace as operations on slots, by the rules of benches/gpu/program.rs: waits, kernels and trims are left out, and
blocks that are live at the end are freed there."""

ALLOCATE, FREE, RECORD = 0, 1, 2


class Program:
    """`operations` are (kind, slot, bytes, stream).

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w") as trace:
    ...     trace.write("#alloctrace v1 streams=2 name=a\\na 7 10 0\\nk 0\\na 9 20 1\\nf 7 1\\na 3 5 0\\n") and trace.flush()
    ...     program = Program(trace.name)
    >>> program.operations == [
    ...     (ALLOCATE, 0, 10, 0), (ALLOCATE, 1, 20, 1), (RECORD, 0, 0, 1), (FREE, 0, 0, 0),
    ...     (ALLOCATE, 0, 5, 0), (FREE, 0, 0, 0), (FREE, 1, 0, 1),
    ... ]
    True
    >>> program.slots, program.streams, program.allocations, program.peak_bytes
    (2, 2, 3, 30)
    """

    def __init__(self, path):
        self.operations, self.slots, self.allocations, self.peak_bytes = [], 0, 0, 0
        self._live, self._free, self._bytes = {}, [], 0
        with open(path) as lines:
            header = dict(word.split("=", 1) for word in next(lines).split() if "=" in word)
            self.streams = int(header["streams"])
            for line in lines:
                self._push(line.split())
        for id_ in sorted(self._live):
            self._end(id_)

    def _push(self, words):
        kind = words[0] if words else "#"
        if kind == "a":
            self._begin(words[1], int(words[2]), int(words[3]) if len(words) > 3 else 0)
        elif kind == "f":
            self._end(words[1], int(words[2]) if len(words) > 2 else None)
        elif kind == "r":
            self.operations.append((RECORD, self._live[words[1]][0], 0, int(words[2])))

    def _begin(self, id_, bytes_, stream):
        if self._free:
            slot = self._free.pop()
        else:
            slot, self.slots = self.slots, self.slots + 1
        self._live[id_] = (slot, stream, bytes_)
        self._bytes += bytes_
        self.peak_bytes = max(self.peak_bytes, self._bytes)
        self.allocations += 1
        self.operations.append((ALLOCATE, slot, bytes_, stream))

    def _end(self, id_, on=None):
        slot, home, bytes_ = self._live.pop(id_)
        if on not in (None, home):
            self.operations.append((RECORD, slot, 0, on))
        self._bytes -= bytes_
        self._free.append(slot)
        self.operations.append((FREE, slot, 0, home))
