"""Tests of the language, written from the contract and not from the implementation."""
