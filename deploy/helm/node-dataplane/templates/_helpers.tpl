{{- define "node-dataplane.labels" -}}
app.kubernetes.io/name: node-dataplane
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "node-dataplane.selector" -}}
app.kubernetes.io/name: node-dataplane
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "node-dataplane.account" -}}
{{- default .Release.Name .Values.serviceAccount.name }}
{{- end }}

{{- define "node-dataplane.configuration" -}}
{{- $own := dict "apiVersion" "kubeproxy.config.k8s.io/v1alpha1" "kind" "KubeProxyConfiguration" "mode" .Values.mode "clusterCIDR" .Values.clusterCIDR -}}
{{- toYaml (mergeOverwrite (deepCopy .Values.config) $own) }}
{{- end }}

{{- define "node-dataplane.capabilities" -}}
{{- $needed := list "NET_ADMIN" -}}
{{- if eq .Values.mode "ebpf" -}}
{{- $needed = list "NET_ADMIN" "BPF" "PERFMON" "SYS_ADMIN" "SYS_PTRACE" -}}
{{- end -}}
{{- toYaml (default $needed .Values.capabilities) }}
{{- end }}

{{- define "node-dataplane.own-configuration" -}}
{{- $own := dict "apiVersion" "node-dataplane/v1alpha1" "kind" "NodeDataplaneConfiguration" "mode" .Values.mode "sysctlRoot" "/host/proc/sys" -}}
{{- if eq .Values.mode "ebpf" -}}
{{- $_ := set $own "cgroupRoot" "/host/sys/fs/cgroup" -}}
{{- end -}}
{{- toYaml (mergeOverwrite (deepCopy .Values.dataplaneConfig) $own) }}
{{- end }}

{{- /* What of AppArmor and SELinux the mode needs, when the values do not say otherwise. */ -}}
{{- define "node-dataplane.unconfined" -}}
{{- if and (eq .Values.mode "ebpf") (not .Values.appArmorProfile) -}}
true
{{- end -}}
{{- end }}

{{- /* In place of an annotation. */ -}}
{{- define "node-dataplane.has-apparmor-field" -}}
{{- if semverCompare ">=1.30-0" .Capabilities.KubeVersion.Version -}}
true
{{- end -}}
{{- end }}

{{- define "node-dataplane.security-modules" -}}
{{- $settings := dict -}}
{{- if .Values.appArmorProfile -}}
{{- $_ := set $settings "appArmorProfile" .Values.appArmorProfile -}}
{{- else if and (include "node-dataplane.unconfined" .) (include "node-dataplane.has-apparmor-field" .) -}}
{{- $_ := set $settings "appArmorProfile" (dict "type" "Unconfined") -}}
{{- end -}}
{{- if .Values.seLinuxOptions -}}
{{- $_ := set $settings "seLinuxOptions" .Values.seLinuxOptions -}}
{{- else if eq .Values.mode "ebpf" -}}
{{- $_ := set $settings "seLinuxOptions" (dict "type" "spc_t") -}}
{{- end -}}
{{- if $settings -}}
# The runtime's profiles let no container write below /sys/fs/bpf.
{{ toYaml $settings }}
{{- end -}}
{{- end }}

{{- /* Where an address of the configuration is asked for on the node, as the fields of a probe. */ -}}
{{- define "node-dataplane.probe" -}}
{{- $address := "0.0.0.0:10256" -}}
{{- if .Values.probeAddress -}}
{{- $address = .Values.probeAddress -}}
{{- else if not .Values.existing.configMap -}}
{{- $address = default $address .Values.config.healthzBindAddress -}}
{{- end -}}
{{- if ne $address "none" -}}
{{- $host := regexReplaceAll "^\\[?(.*?)(\\]:[0-9]+|\\])?$" $address "${1}" -}}
{{- if regexMatch "^[^:]+:[0-9]+$" $address -}}
{{- $host = regexReplaceAll ":[0-9]+$" $address "" -}}
{{- end -}}
{{- $host = get (dict "0.0.0.0" "127.0.0.1" "::" "::1") $host | default $host -}}
host: {{ $host | quote }}
path: /healthz
port: {{ include "node-dataplane.port" (list $address 10256) }}
{{- end -}}
{{- end }}

{{- /* The port of an address, or the one that it has when it names none. */ -}}
{{- define "node-dataplane.port" -}}
{{- $address := index . 0 -}}
{{- if regexMatch "^([^:]+|\\[.*\\]):[0-9]+$" $address -}}
{{- regexFind "[0-9]+$" $address -}}
{{- else -}}
{{- index . 1 -}}
{{- end -}}
{{- end }}

{{- /* Of the metrics; an error where nobody else could read them. */ -}}
{{- define "node-dataplane.metrics-port" -}}
{{- $address := .Values.config.metricsBindAddress | default "127.0.0.1:10249" -}}
{{- if .Values.existing.configMap -}}
{{- .Values.metricsPort -}}
{{- else if regexMatch "^(127\\.|\\[?::1(\\]|$))" $address -}}
{{- fail "config.metricsBindAddress must be an address that Prometheus reaches, for example 0.0.0.0:10249" -}}
{{- else -}}
{{- include "node-dataplane.port" (list $address 10249) -}}
{{- end -}}
{{- end }}
