#!/bin/sh
# Makes certificates for a cluster of one's own, with openssl:
#
#   certificates.sh FOLDER NAME ROLE [SAN…]
#
# writes FOLDER/NAME/{ca.crt,tls.crt,tls.key} for ROLE (coordinator, worker, submitter, viewer) and hosts such as DNS:worker-1 or
# IP:10.0.0.7. The authority is made with the first, in FOLDER/authority: keep it off the cluster.
set -eu

if [ $# -lt 3 ]; then
    echo "usage: certificates.sh FOLDER NAME ROLE [SAN...]" >&2
    exit 2
fi
folder=$1 name=$2 role=$3
shift 3
case $role in
coordinator | worker | submitter | viewer) ;;
*)
    echo "certificates.sh: $role is no role: give coordinator, worker, submitter or viewer" >&2
    exit 2
    ;;
esac
umask 077
authority=$folder/authority
if [ ! -f "$authority/ca.key" ]; then
    mkdir -p "$authority"
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 -subj "/CN=espalier authority" \
        -keyout "$authority/ca.key" -out "$authority/ca.crt" 2>/dev/null
fi
names=URI:espalier:role:$role
for san in "$@"; do
    names=$names,$san
done
mkdir -p "$folder/$name"
openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=$name" -keyout "$folder/$name/tls.key" \
    -out "$authority/$name.csr" 2>/dev/null
printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth,clientAuth\n' "$names" > "$authority/$name.ext"
openssl x509 -req -in "$authority/$name.csr" -CA "$authority/ca.crt" -CAkey "$authority/ca.key" -CAcreateserial -days 90 \
    -extfile "$authority/$name.ext" -out "$folder/$name/tls.crt" 2>/dev/null
cp "$authority/ca.crt" "$folder/$name/ca.crt"
