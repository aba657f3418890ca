"""Secure aggregation: the server learns the sum of the cohort's vectors and nothing else.

Pure state machines for client and server, without I/O: ``Client.step`` turns a message into the
next one, ``Server.receive`` and ``Server.advance`` run a round. docs/secure-aggregation.md tells
the protocol, its assumptions and what a coalition learns.

Source: Bell, Bonawitz, Gascón, Lepoint and Raykova 2020, "Secure single-server aggregation with
(poly)logarithmic overhead" (ePrint 2020/704); Bonawitz et al. 2017, "Practical secure aggregation
for privacy-preserving machine learning" (signed keys, consistency round).
"""
