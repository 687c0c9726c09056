"""The host backend: quantised CPU kernels with run-time choice of instruction set, installed with ktcore itself."""
