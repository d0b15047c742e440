"""Clients that train one model together: a definition, clients, rounds and a report; the same in one process and over Flower.

definition   the YAML as it was given           clients      who they are and which rows each has
workplace    the one base of a process          methods/     what a client computes and what the server makes of it
client       answers the server's messages      server       the rounds
messages     what travels                       store        what the server remembers
folder       the folder of a federation         report       tables and curves
flower/      the same over real connections
"""
