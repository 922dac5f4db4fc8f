#!/bin/sh
# A plugin of plain files, so that fake-xapi can be tested without the plugins that it is there to test:
# a volume is a directory, a snapshot a full copy, a mirror one nbdcopy.
in=$(cat)
f() { printf '%s' "$in" | sed -n "s/.*\"$1\":\"\([^\"]*\)\".*/\1/p"; }
n() { printf '%s' "$in" | sed -n "s/.*\"$1\":\([0-9]*\).*/\1/p"; }
sr=$(f sr); key=$(f key); v=$sr/$key
uri=$(f uri); d=${uri#qsd://}
die() { printf '{"code":"%s","params":["%s"],"backtrace":{"error":"","files":[],"lines":[]}}' "$1" "$2"; exit 1; }
show() {
	k=; for e in "$1"/keys/*; do [ -e "$e" ] && k="$k${k:+,}\"${e##*/}\":\"$(cat "$e")\""; done
	printf '{"key":"%s","uuid":"%s","name":"%s","description":"","read_write":true,"sharable":false,"virtual_size":%s,"physical_utilisation":0,"uri":["qsd://%s"],"keys":{%s}}' \
		"${1##*/}" "${1##*/}" "$(cat "$1/name")" "$(stat -c %s "$1/disk")" "$1" "$k"
}
copy() {
	[ -e "$v/disk" ] || die Volume_does_not_exist "$key"
	new=$sr/$(cat /proc/sys/kernel/random/uuid); mkdir -p "$new/keys"
	cp --sparse=always "$v/disk" "$new/disk"; cp "$v/name" "$new/name"; printf %s "$key" > "$new/parent"
	show "$new"
}
case ${0##*/} in
Plugin.Query) printf '{"plugin":"plain","name":"","description":"","vendor":"","copyright":"","version":"","required_api_version":"5.0","features":["VDI_MIRROR","VDI_ACTIVATE_READONLY"],"configuration":{},"required_cluster_stack":[]}' ;;
SR.attach) printf '"%s"' "$(f uri | sed 's|^file://||')" ;;
SR.stat) printf '{"sr":"s","name":"","description":"","free_space":1,"total_space":1,"datasources":[],"clustered":false,"health":["Healthy",""]}' ;;
SR.ls)
	printf '['; c=
	for e in "$sr"/*/; do [ -e "$e/disk" ] && { printf '%s' "$c"; show "${e%/}"; c=,; }; done
	printf ']' ;;
Volume.create)
	new=$sr/$(cat /proc/sys/kernel/random/uuid); mkdir -p "$new/keys"
	truncate -s "$(n size)" "$new/disk"; f name > "$new/name"; show "$new" ;;
Volume.stat) [ -e "$v/disk" ] || die Volume_does_not_exist "$key"; show "$v" ;;
Volume.snapshot | Volume.clone) copy ;;
Volume.destroy)
	[ -z "$(ls "$v/domains" 2>/dev/null | grep '^[0-9]')" ] || die SR_BACKEND_FAILURE_24 "$key"
	[ -e "$v/pid" ] && kill "$(cat "$v/pid")"
	rm -rf "$v"; echo null ;;
Volume.resize) truncate -s "$(n new_size)" "$v/disk"; echo null ;;
Volume.set) f v | tr -d '\n' > "$v/keys/$(f k)"; echo null ;;
Volume.unset) rm -f "$v/keys/$(f k)"; echo null ;;
Volume.set_name) f new_name > "$v/name"; echo null ;;
Volume.set_description) echo null ;;
Datapath.attach)
	[ -e "$d/disk" ] || die Volume_does_not_exist "$uri"
	mkdir -p "$d/domains"; : > "$d/domains/$(f domain)"
	[ -S "$d/nbd.sock" ] || qemu-storage-daemon --daemonize --pidfile "$d/pid" \
		--blockdev "driver=file,node-name=f,filename=$d/disk,discard=unmap" \
		--nbd-server "addr.type=unix,addr.path=$d/nbd.sock,max-connections=0" \
		--export "type=nbd,id=e,node-name=f,name=${d##*/},writable=on" || die SR_BACKEND_FAILURE_46 "$uri"
	printf '{"implementations":[["XenDisk",{"params":"","extra":{},"backend_type":"qdisk"}],["Nbd",{"uri":"nbd:unix:%s:exportname=%s"}]]}' "$d/nbd.sock" "${d##*/}" ;;
Datapath.activate | Datapath.activate_readonly | Datapath.deactivate) echo null ;;
Datapath.detach)
	rm -f "$d/domains/$(f domain)"
	if [ -e "$d/pid" ] && [ -z "$(ls "$d/domains")" ]; then
		pid=$(cat "$d/pid"); kill "$pid"
		while [ -d "/proc/$pid" ] && ! grep -q '^State:.Z' "/proc/$pid/status" 2>/dev/null; do sleep 0.01; done
		rm -f "$d/pid" "$d/nbd.sock"
	fi
	echo null ;;
Data.mirror)
	rm -f "$d/mirror"; remote=$(f remote)
	# Only a proxy that is not there yet is tried again: there is one connection and no other.
	setsid sh -c 'i=0; while :; do
			said=$(nbdcopy --connections=1 --flush "nbd+unix:///$2?socket=$1/nbd.sock" "$3" 2>&1) && break
			case $said in *refused* | *"No such file"*) ;; *) echo 1 > "$1/mirror"; exit ;; esac
			i=$((i + 1)); [ $i -lt 20 ] || { echo 1 > "$1/mirror"; exit; }; sleep 0.1
		done; echo 0 > "$1/mirror"' mirror "$d" "${d##*/}" "$remote" </dev/null >/dev/null 2>&1 &
	printf '["MirrorV1","%s"]' "$d" ;;
Data.stat)
	d=$(printf '%s' "$in" | sed -n 's/.*\["MirrorV1","\([^"]*\)"\].*/\1/p')
	i=0; while [ ! -s "$d/mirror" ] && [ $i -lt 20 ]; do sleep 0.05; i=$((i + 1)); done
	case $(cat "$d/mirror" 2>/dev/null) in
	0) printf '{"failed":false,"complete":true,"progress":1}' ;;
	1) printf '{"failed":true,"complete":false}' ;;
	*) printf '{"failed":false,"complete":false,"progress":0.5}' ;;
	esac ;;
esac
