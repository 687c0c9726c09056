"""The plugin seam: what a backend registers, what a device offers, and the registry that keeps them apart."""

from ktcore.backend.capabilities import Capabilities
from ktcore.backend.hookspecs import hookimpl
from ktcore.backend.implementation import (
    CacheOwner,
    ExpertLoad,
    Implementation,
    LoadRequest,
    Module,
    PageTensors,
    StateOwner,
    StateTensors,
    Supported,
    Unsupported,
)
from ktcore.backend.registry import BackendState, Registry
from ktcore.backend.runtime import DeviceGraph, DeviceRuntime, GraphMode, HostCallbackMode, MemoryInfo
from ktcore.backend.spec import API_VERSION, Backend, BackendSpec, Probe

__all__ = [
    "API_VERSION",
    "Backend",
    "BackendSpec",
    "BackendState",
    "CacheOwner",
    "Capabilities",
    "DeviceGraph",
    "DeviceRuntime",
    "ExpertLoad",
    "GraphMode",
    "HostCallbackMode",
    "Implementation",
    "LoadRequest",
    "MemoryInfo",
    "Module",
    "PageTensors",
    "Probe",
    "Registry",
    "StateOwner",
    "StateTensors",
    "Supported",
    "Unsupported",
    "hookimpl",
]
