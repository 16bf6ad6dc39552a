"""What each SASS opcode is, and what a memory instruction moves.

Source of the names: CUDA Binary Utilities 13.0, chapter 4 "Instruction Set Reference" (Ampere and
Ada, Hopper, Blackwell); those that the chapter lacks are from disassembled kernels.
"""

from __future__ import annotations

import re

from kimi_ops.testing.static.instructions import Access

_TABLE = {
    "tensor": """
        HMMA IMMA DMMA BMMA QMMA OMMA HGMMA IGMMA QGMMA BGMMA
        UTCHMMA UTCIMMA UTCQMMA UTCOMMA UTCMXQMMA""",
    "tensor memory": "LDT LDTM STT STTM UTCCP UTCSHIFT UTCATOMSWS UTCSTSWS UVIRTCOUNT",
    "fp64": "DADD DFMA DMUL DSETP DMNMX",
    "fp32": """
        FADD FADD2 FADD32I FCHK FFMA FFMA2 FFMA32I FMNMX FMNMX3 FMUL FMUL2 FMUL32I FSEL FSET FSETP
        FSWZADD FHADD FHFMA UFADD UFFMA UFMNMX UFMUL UFSEL UFSET UFSETP""",
    "fp16": """
        HADD2 HADD2_32I HFMA2 HFMA2_32I HMNMX2 HMUL2 HMUL2_32I HSET2 HSETP2 VHMNMX""",
    "special": "MUFU",
    "integer": """
        BMSK BREV FLO IABS IADD IADD3 IADD32I IDP IDP4A IMAD IMNMX IMUL IMUL32I ISCADD ISCADD32I
        ISETP LEA LEPC LOP LOP3 LOP32I POPC PRMT SGXT SHF SHL SHR VABSDIFF VABSDIFF4 VIADD
        VIADDMNMX VIMNMX VIMNMX3 UBMSK UBREV UFLO UIABS UIADD3 UIMAD UIMNMX UISETP ULEA ULEPC ULOP
        ULOP3 ULOP32I UPOPC UPRMT USGXT USHF USHL USHR UVIADD UVIADDMNMX UVIMNMX UVIMNMX3""",
    "convert": """
        F2F F2FP F2I F2IP FRND I2F I2FP I2I I2IP UF2F UF2FP UF2I UF2IP UFRND UI2F UI2FP UI2I
        UI2IP""",
    "move": """
        MOV MOV32I MOVM SEL S2R CS2R S2UR CS2UR R2UR UR2R B2R R2B UMOV USEL GETLMEMBASE
        SETLMEMBASE UGETNEXTWORKID""",
    "predicate": "PLOP3 PSETP P2R R2P UPLOP3 UPSETP UP2UR UR2UP",
    "constant": "LDC ULDC LDCU",
    "global": "LDG STG LDGMC",
    "generic": "LD ST QSPC",
    "shared": "LDS STS STAS",
    "shared matrix": "LDSM STSM",
    "local": "LDL STL",
    "async copy": """
        LDGSTS UBLKCP UBLKPF UBLKRED UTMALDG UTMASTG UTMAPF UTMAREDG UTMACCTL""",
    "atomic": "ATOM ATOMG ATOMS ATOMIC RED REDG REDAS",
    "texture": "TEX TLD TLD4 TMML TXD TXQ SUATOM SULD SURED SUST FOOTPRINT",
    "barrier": """
        BAR DEPBAR LDGDEPBAR UTMACMDFLUSH MEMBAR FENCE ERRBAR CGAERRBAR SYNCS ARRIVES WARPSYNC
        WARPGROUP WARPGROUPSET UCGABAR_ARV UCGABAR_WAIT UTCBAR ACQBULK ACQSHMINIT CCTL CCTLL CCTLT
        ENDCOLLECTIVE""",
    "shuffle": "SHFL VOTE VOTEU MATCH REDUX CREDUX ELECT",
    "control": """
        BMOV BPT BRA BREAK BRX BRXU BSSY BSYNC CALL EXIT JMP JMX JMXU KILL NANOSLEEP PREEXIT RET
        RPCMOV YIELD USETMAXREG USETSHMSZ SETCTAID PMTRIG UCLEA""",
    "nop": "NOP",
}
_CLASS_OF = {name: kind for kind, names in _TABLE.items() for name in names.split()}

_SPACES = {
    "LDG": ("global", "load"),
    "STG": ("global", "store"),
    "LD": ("generic", "load"),
    "ST": ("generic", "store"),
    "LDS": ("shared", "load"),
    "STS": ("shared", "store"),
    "STAS": ("shared", "store"),
    "LDSM": ("shared", "load"),
    "STSM": ("shared", "store"),
    "LDL": ("local", "load"),
    "STL": ("local", "store"),
    "LDGSTS": ("global", "async load"),
    "UTMALDG": ("global", "bulk load"),
    "UTMASTG": ("global", "bulk store"),
}
_WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


def classify(opcode: str, operands: str) -> str:
    """The class of a SASS instruction; ``other`` if the tables do not have it.

    Args:
        opcode: with modifiers, ``IMAD.MOV.U32``.
        operands: as nvdisasm prints them. They matter because ptxas moves constants with
            arithmetic: ``HFMA2.MMA R7, -RZ, RZ, 0, 2.98e-07`` multiplies nothing, and despite
            its name is no tensor instruction either.
    """
    base, _, rest = opcode.partition(".")
    if base == "IMAD" and rest.startswith("MOV"):
        return "move"
    if base in ("HFMA2", "FFMA", "HADD2") and re.search(r",\s*-?RZ,\s*-?RZ\b", operands):
        return "move"
    return _CLASS_OF.get(base, "other")


def access(opcode: str, operands: str) -> Access | None:
    """What a SASS instruction moves between memory and registers, or None.

    Widths are per thread. A matrix load (PTX ISA, "Warp-level matrix load instruction:
    ldmatrix") gives each thread 32 bits of each 8x8 matrix of 16-bit elements, and 64 bits of a
    16x16 one of bytes.
    """
    base, *modifiers = opcode.split(".")
    if base == "UBLKCP":
        # Destination space first, then source: S.G is a load, G.S a store.
        directions = [m for m in modifiers if m in ("S", "G", "T")]
        return Access("global", "bulk store" if directions[:1] == ["G"] else "bulk load", 0)
    if base not in _SPACES:
        return None
    space, what = _SPACES[base]
    if what.startswith("bulk"):
        return Access(space, what, 0)
    if base in ("LDSM", "STSM"):
        count = int(modifiers[-1]) if modifiers[-1:] and modifiers[-1].isdigit() else 1
        each = 64 if any(m.startswith("MT16") or m.startswith("M16") for m in modifiers) else 32
        return Access(space, what, each * count)
    return Access(space, what, next((_WIDTHS[m] for m in modifiers if m in _WIDTHS), 32))
