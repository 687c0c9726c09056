"""Starts the servers that are measured: ktcore's, and llama.cpp's on the same file, each as a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serving_client import Target

ROOT = Path(__file__).resolve().parents[1]
PEER = "llama-cpp-python==0.3.36"
NATIVE = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF"]
NATIVE += ["-DLLAMA_OPENSSL=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_BUILD_APP=OFF"]
# Sequences that llama-server may run at once: all that any scenario has.
SLOTS = 16


@dataclass
class Server:
    """A server process, and how to ask it."""

    name: str
    command: list[str]
    fields: dict[str, Any]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    serial: bool = False
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> Target:
        """Run it and wait until it answers.

        Raises:
            RuntimeError: it ended before; its log says why.
        """
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.command, "--port", str(self.port)],
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment},
            )
        ends = time.monotonic() + 300
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > ends:
                raise RuntimeError(f"{self.name} does not answer:\n{self.log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)
        return Target(self.name, self.port, self.fields, self.serial)

    def stop(self) -> None:
        """End it as an operator would."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/v1/models", timeout=2) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False


def ktcore_server(model: Path, threads: int, context: int, folder: Path, *more: str) -> Server:
    """`ktcore serve`; its prefixes are kept in `folder`."""
    command = [sys.executable, "-m", "ktcore.cli.main", "serve", str(model), "--name", "bench", "--backend", "cpu"]
    command += ["--threads", str(threads), "--context", str(context), "--log", "off", *more]
    command += ["--prefix-cache", str(folder / "prefixes"), "--prefix-cache-memory", "2GiB"]
    return Server("ktcore", command, {"ignore_eos": True}, folder / "ktcore.log", {"KTCORE_PLUGINS": "cpu"})


def llama_server(binary: Path, model: Path, threads: int, context: int, folder: Path) -> Server:
    """llama.cpp's own server: sequences run together and share the context."""
    command = [str(binary), "--model", str(model), "--alias", "bench", "--threads", str(threads)]
    command += ["--threads-batch", str(threads), "--ctx-size", str(context), "--parallel", str(SLOTS), "--kv-unified"]
    return Server("llama-server", command, {"ignore_eos": True}, folder / "llama-server.log")


def llama_cpp_python(python: Path, model: Path, threads: int, context: int, folder: Path) -> Server:
    """llama-cpp-python's server: one request after the other. It knows no ignore_eos, so the ends are biased away."""
    command = [str(python), "-m", "llama_cpp.server", "--model", str(model), "--model_alias", "bench"]
    command += ["--n_threads", str(threads), "--n_threads_batch", str(threads), "--n_ctx", str(context)]
    command += ["--n_batch", "512", "--interrupt_requests", "false", "--verbose", "false"]
    bias = {str(i): -100.0 for i in _ends(model)}
    return Server("llama-cpp-python", command, {"logit_bias": bias}, folder / "llama-cpp-python.log", serial=True)


def install_llama_cpp_python(folder: Path) -> Path:
    """The Python of an environment of its own that has it, built for this CPU the first time."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    found = subprocess.run([str(python), "-c", "import llama_cpp.server"], capture_output=True, check=False)
    if found.returncode:
        package = PEER.replace("==", "[server]==")
        words = [str(python), "-m", "pip", "install", "--no-binary", "llama-cpp-python", package]
        subprocess.run(words, check=True, env={**os.environ, "CMAKE_ARGS": "-DGGML_NATIVE=ON"})
    return python


def build_llama_server(folder: Path) -> Path:
    """llama.cpp's server, built for this CPU the first time from the sources that llama-cpp-python carries: minutes."""
    binary = folder / "build" / "bin" / "llama-server"
    if binary.exists():
        return binary
    folder.mkdir(parents=True, exist_ok=True)
    fetch = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python"]
    subprocess.run([*fetch, "--dest", str(folder), PEER], check=True)
    with tarfile.open(next(folder.glob("llama_cpp_python-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    sources = next(folder.glob("llama_cpp_python-*/vendor/llama.cpp"))
    subprocess.run(["cmake", "-S", str(sources), "-B", str(folder / "build"), *NATIVE], check=True)
    build = ["cmake", "--build", str(folder / "build"), "--target", "llama-server", "--parallel", str(os.cpu_count())]
    subprocess.run(build, check=True)
    return binary


def _ends(model: Path) -> list[int]:
    """Ids of the control tokens, which end answers."""
    from gguf import GGUFReader

    kinds = GGUFReader(model).fields["tokenizer.ggml.token_type"]
    return [i for i, part in enumerate(kinds.data) if int(kinds.parts[part][0]) == 3]
