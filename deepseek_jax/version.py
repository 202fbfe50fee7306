"""Names the version of the library: of its wheel, its results and its flags."""

__version__ = '0.1.0'
