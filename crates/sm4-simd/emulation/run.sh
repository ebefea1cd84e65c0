#!/bin/sh
# Runs the backends of sm4-simd on an emulated processor with GFNI and AVX-512 (Bochs). Exits with 0
# if all passed.
#
# On Debian: apt-get install bochs binutils isolinux syslinux-common xorriso. Bochs must be 2.8 or
# newer. Debian 12 has 2.7, which computes GF2P8AFFINEQB wrongly; the program detects that. To use
# your own Bochs, built from https://github.com/bochs-emu/Bochs with `./configure
# --enable-cpu-level=6 --enable-x86-64 --enable-avx --enable-evex --with-nogui`, set BOCHS to it and
# BOCHS_BIOS to its BIOS-bochs-latest.
set -eu
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

RUSTFLAGS="-C relocation-model=static" CARGO_TARGET_DIR="$work/target" \
    cargo build --quiet --release --target x86_64-unknown-linux-gnu
as --64 -o "$work/boot.o" boot.s
ld -m elf_x86_64 -n -static --no-warn-rwx-segments --gc-sections -T link.ld -o "$work/program" "$work/boot.o" \
    "$work/target/x86_64-unknown-linux-gnu/release/libsm4_simd_emulation.a"

mkdir -p "$work/disc/isolinux"
# Multiboot loaders accept only 32-bit files. The code in the file switches to 64 bits.
objcopy -O elf32-i386 "$work/program" "$work/disc/isolinux/program"
syslinux=/usr/lib/syslinux/modules/bios
cp /usr/lib/ISOLINUX/isolinux.bin $syslinux/ldlinux.c32 $syslinux/mboot.c32 $syslinux/libcom32.c32 "$work/disc/isolinux/"
printf 'DEFAULT mboot.c32 program\nPROMPT 0\n' > "$work/disc/isolinux/isolinux.cfg"
xorriso -as mkisofs -quiet -o "$work/disc.iso" -b isolinux/isolinux.bin -c isolinux/boot.cat \
    -no-emul-boot -boot-load-size 4 -boot-info-table "$work/disc" 2> /dev/null

cat > "$work/bochsrc" <<END
megs: 128
romimage: file=${BOCHS_BIOS:-/usr/share/bochs/BIOS-bochs-latest}
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
cpu: model=tigerlake, count=1, ips=50000000, reset_on_triple_fault=0
ata0-master: type=cdrom, path=$work/disc.iso, status=inserted
boot: cdrom
port_e9_hack: enabled=1
log: $work/log
panic: action=fatal
error: action=ignore
info: action=ignore
clock: sync=none
END
# Debian's Bochs has sound, and needs a display that works without a screen.
if [ -z "${BOCHS:-}" ]; then
    cat >> "$work/bochsrc" <<END
display_library: rfb, options="timeout=0"
sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy
plugin_ctrl: speaker=0, sb16=0, es1370=0
END
else
    echo 'display_library: nogui' >> "$work/bochsrc"
fi
# Debian's Bochs has a built-in debugger that waits for a command. Other builds do not know -rc.
set -- -q -f "$work/bochsrc"
if "${BOCHS:-bochs}" --help 2>&1 | grep -q -e -rc; then
    echo continue > "$work/commands"
    set -- "$@" -rc "$work/commands"
fi
"${BOCHS:-bochs}" "$@" < /dev/null 2>&1 | grep -a --line-buffered -o -E '(detected|passed|FAILED): .*|^DONE' | tee "$work/result"
grep -q '^passed: avx512-gfni with clmul-512' "$work/result" && grep -q '^DONE' "$work/result"
